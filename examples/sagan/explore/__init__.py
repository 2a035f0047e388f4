"""An HTML page that shows the attention of any point of a run's samples."""
