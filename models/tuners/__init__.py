"""Parameter-efficient tuning: `TUNERS` in `table.py`, and the tuners of the peft library."""
