"""What runs show: statistics, tables, plots, comparisons, reports."""
