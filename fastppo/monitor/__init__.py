"""What is seen of a run: health figures and alarms, metrics, samples, and the files of its folder."""
