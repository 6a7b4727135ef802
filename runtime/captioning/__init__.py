"""Images into words."""
