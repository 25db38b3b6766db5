"""SCAN: cycles that leave out more and more of the smallest and largest losses."""
