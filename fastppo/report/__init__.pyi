from .frontier_pages import Outcome as Outcome
from .frontier_pages import best_of_n_page as best_of_n_page
from .frontier_pages import methods_page as methods_page
