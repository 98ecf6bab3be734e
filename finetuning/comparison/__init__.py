"""What a comparison of two models shows: tables, pictures, and the report.

clicks: simulated clicks, as a table, a chart and a file
detection: how many objects both models find without a prompt, as a table and a file
figures: the pictures: images with both masks, and a chart of all objects
report: what a comparison says, and results.csv
report_page: the report as one HTML file (its frame: report.html)
report_sentences: the sentences below the box
tables: tables of text, and how they look on a console
"""
