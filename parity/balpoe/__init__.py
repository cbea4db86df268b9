"""BalPoE and LGLA."""
