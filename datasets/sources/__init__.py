"""Where images and labels come from: list files, class folders, built-in data sets, in memory or on disk."""
