"""Grids of training runs, and the tables and plots of their results. Nothing else in the project imports this.

``python -m experiments GRID ...`` in the root of a checkout runs a grid; docs/guides/reproduce.md describes it.
"""
