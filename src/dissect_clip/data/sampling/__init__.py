"""Which sample is read when, by which worker, under which id."""
