"""`report.html` and `predictions.csv` of an evaluation, made from its result and its predictions."""
