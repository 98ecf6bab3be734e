"""The output of a comparison of two models: tables, pictures and the report.

clicks: simulated clicks: a table, a chart and a file
detection: the objects that both models find without a prompt: a table and a file
figures: the pictures: images with both masks, and a scatter chart of all objects
report: the summary of a comparison, and results.csv
report_page: the report as one HTML file (its template: report.html)
report_sentences: the sentences below the box
tables: tables of text, laid out for a console
"""
