"""What the stages do: their notebooks, their work as jobs."""
