"""Which data sets a shipped model config is meant for, above all."""

from tailtune.configs.shipped_configs import main_pairs

PAIRS = main_pairs()
