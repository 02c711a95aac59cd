"""Problem files of any form, as rows of plain values: one file a form, and the layouts by which others store problems."""
