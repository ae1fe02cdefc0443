"""How things are written for a person: foreign text made safe, losses, durations, digests, HTML.

`foreign_text` escapes what others wrote; `loss_format`, `duration_format` and `digest_format` put
figures into words, the same wherever one is shown; `html_markup` and `html_style` make pages;
`stages` is the logger that says which step of judging begins.
"""
