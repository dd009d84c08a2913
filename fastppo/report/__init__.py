"""A run as one HTML file, without network: `python -m fastppo.report RUN [OTHER_RUN] [--output FILE]`.

`run` reads the run's folder, which may still be written to; `curves` thins and smooths numbers; `plot` draws charts;
`frontier`, `health`, `texts` and `page` write the sections. page.css and page.js go into the file as they are.
"""
