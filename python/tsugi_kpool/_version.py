"""The version; a test compares it with Cargo.toml, where the wheel has it from."""

__version__ = "0.2.0"
