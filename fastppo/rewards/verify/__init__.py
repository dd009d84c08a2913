"""Final answers to questions of mathematics, compared with reference answers in processes that can be killed."""
