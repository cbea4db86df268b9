"""Parameter-efficient tuning: our tuners (`TUNERS` in `table.py`) and those of the peft library (`peft_table.py`)."""
