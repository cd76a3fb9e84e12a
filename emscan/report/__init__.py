"""The report's data classes and one class per output format; no torch."""
