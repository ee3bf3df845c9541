"""The one exception for mistakes a user can repair."""


class Qwt2Error(Exception):
    """A problem with the input, named in one sentence together with what to do about it.

    Whoever runs the library from the command line prints the sentence alone and exits with code 2;
    any other exception is a defect in the library and keeps its traceback.
    """
