"""Images and weights from elsewhere."""
