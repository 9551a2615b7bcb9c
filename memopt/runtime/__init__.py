"""Running a planned step and finding out what it really took: `measure`, `opcost`, `guard`."""
