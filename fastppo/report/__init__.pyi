from .best_of_n import best_of_n_page as best_of_n_page
