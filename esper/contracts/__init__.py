"""Pydantic messages that cross a process. Imports nothing else of Esper."""
