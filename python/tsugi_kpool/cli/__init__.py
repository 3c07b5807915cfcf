"""The commands of ``python -m tsugi_kpool``."""
