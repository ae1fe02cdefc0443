"""How things are written for a person: foreign text made safe, losses, durations, digests, pages.

foreign_text.py escapes what others wrote; loss_format.py, duration_format.py, digest_format.py and
value_format.py put figures into words, the same wherever one is shown. document.py is a page as a
tree, rendered as HTML, markdown or lines; html_markup.py, page.css and svg_chart.py are what it is
drawn with. stages.py is the logger that says which step of judging begins.
"""
