"""The page that shows a trained model, complete in one file; the only package that knows HTML."""
