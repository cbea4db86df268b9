"""DirMixE."""
