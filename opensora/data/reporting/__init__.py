"""The report of a data set: one page with its counts, histograms and pictures."""
