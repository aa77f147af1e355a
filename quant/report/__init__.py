"""Pictures of what was measured and chosen, and one HTML page that holds them all.

`style` is the look, `drawing` turns a matplotlib figure into files, `axes` makes log axes, `page`
lays out any report, `files` puts all in a folder; `figures` and `sensitivity_report` are about
errors and the choice of what keeps 16 bits.
"""
