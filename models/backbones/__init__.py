"""Image encoders, their pre-trained weights, and CLIP's text encoder. The table of backbones is in `table.py`."""
