"""The strategies, one file or folder each."""
