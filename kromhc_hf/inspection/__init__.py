"""What the streams do: recorded, counted, drawn."""
