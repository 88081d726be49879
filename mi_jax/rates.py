"""The rates that everything here runs at."""

FPS = 25
"""Video frames a second."""
SAMPLE_RATE = 16_000
"""Sound samples a second, mono, as the models hear it."""
