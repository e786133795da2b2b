"""What models cost, and all that an evaluation has found on one page.

cost            parameters, FLOPs, tokens per second, peak memory
page            the page, of report.html
"""
