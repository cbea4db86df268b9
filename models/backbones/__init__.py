"""Image encoders and text towers. The table of backbones is `BACKBONES` in `table.py`."""
