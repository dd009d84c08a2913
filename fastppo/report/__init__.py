"""One HTML file that shows a run, without network access: `python -m fastppo.report RUN [OTHER_RUN] [--output FILE]`.

`run` reads the run's folder, to which a run may still write, and `lines` reads and checks its files; `curves` thins and
smooths the numbers; `titles` has the title and the unit of each metric, `levels` the levels at which it warns or acts;
`plot` draws charts; `tiles`, `learning`, `frontier`, `health`, `times`, `texts`, `settings` and `page` write the
sections. page.css and page.js are copied into the file. `best_of_n` writes such a page of best-of-n.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
