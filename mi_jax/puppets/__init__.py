"""The small world that this project draws and trains by itself: portraits that talk, and how they are read back."""
