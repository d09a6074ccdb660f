"""PIPA (Prior-Informed Preference Alignment) as a plugin on OpenRLHF."""

__version__ = "0.1.0"
