"""Urza stores, Tezzeret compiles, Oona carries messages."""
