//! The connection to a guest, which ends with the guest.
//!
//! On a bridge nothing closes the connection to a VM whose process has ended: the host would keep
//! sending until the keep-alive gives up. So the caller, which knows the VM, provides a future that
//! completes when the VM ends.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Completes once the guest has ended, and returns why.
pub(crate) type Lifeline = Pin<Box<dyn Future<Output = String> + Send>>;

/// The error of a connection whose guest has ended.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
struct LineCut(String);

/// Returns whether this is the error of a connection whose guest has ended.
pub(super) fn is_cut(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|cause| cause.is::<LineCut>())
}

/// A connection that breaks when its lifeline completes, after everything received before was read.
pub(super) struct GuardedStream {
    stream: TcpStream,
    lifeline: Option<Lifeline>,
    cut: Option<LineCut>,
}

impl GuardedStream {
    pub(super) fn new(stream: TcpStream, lifeline: Option<Lifeline>) -> Self {
        Self { stream, lifeline, cut: None }
    }

    /// Returns the failure if the guest has ended, and else registers this task to be woken at its
    /// end.
    fn cut<T>(&mut self, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        if let Some(lifeline) = &mut self.lifeline
            && let Poll::Ready(why) = lifeline.as_mut().poll(context)
        {
            (self.lifeline, self.cut) = (None, Some(LineCut(why)));
        }
        match &self.cut {
            Some(cut) => Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, cut.clone()))),
            None => Poll::Pending,
        }
    }
}

impl AsyncRead for GuardedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match Pin::new(&mut self.stream).poll_read(context, buffer) {
            Poll::Pending => self.cut(context),
            read => read,
        }
    }
}

impl AsyncWrite for GuardedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.stream).poll_write(context, data) {
            Poll::Pending => self.cut(context),
            written => written,
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn what_came_before_the_end_is_read_and_then_the_line_is_cut() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut guest, _) = listener.accept().await.unwrap();
        let (end, ended) = oneshot::channel::<()>();
        let mut line = GuardedStream::new(
            stream,
            Some(Box::pin(async {
                ended.await.map_or_else(|_| "it is over".to_owned(), |()| String::new())
            })),
        );
        guest.write_all(b"last words").await.unwrap();
        line.stream.readable().await.unwrap();
        drop(end);
        let mut words = [0; 10];
        line.read_exact(&mut words).await.unwrap();
        assert_eq!(&words, b"last words");
        for _ in 0..2 {
            let error = line.read(&mut words).await.unwrap_err();
            assert!(is_cut(&error) && error.to_string() == "it is over", "{error:?}");
        }
        drop(guest);
    }
}
