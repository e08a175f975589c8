"""The environment variables that are read without the settings."""

__all__ = ["CONFIG_VARIABLE", "DEBUG_DIR_VARIABLE", "LOGS_VARIABLE"]

CONFIG_VARIABLE = "ESPER_CONFIG"
"""Names the YAML file of settings where none is given."""

DEBUG_DIR_VARIABLE = "ESPER_DEBUG_DIR"
"""The folder that graphs are written to; see `esper.compiler.debug`."""

LOGS_VARIABLE = "ESPER_LOGS"
"""What is logged; read when `esper` is imported."""
