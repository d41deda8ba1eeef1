//! What real databases do when their storage fails: outcomes that their makers, papers or issues published.
