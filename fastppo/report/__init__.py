"""A run as one HTML file, without network: `python -m fastppo.report RUN [OTHER_RUN] [--output FILE]`.

`run` reads the run's folder, which may still be written to, and `lines` its files; `curves` thins and smooths numbers;
`stats` tells what is noise; `titles` says what each metric is, `levels` where it warns or acts; `plot` draws charts;
`tiles`, `learning`, `frontier`, `health`, `times`, `texts`, `settings` and `page` write the sections. page.css and
page.js go into the file as they are.
"""
