//! The operations that the command and any other program call.
