//! Counts the clients that are connected, because an answer and the end of its connection must not arrive
//! together: containerd's client may then see the end alone.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

/// Accepted connections, each counted as long as it is open.
pub struct Connections {
    listener: UnixListener,
    open: watch::Sender<usize>,
}

impl Connections {
    /// Counts the connections of this listener; the receiver has their number.
    pub fn of(listener: UnixListener) -> (Self, watch::Receiver<usize>) {
        let (open, count) = watch::channel(0);
        (Self { listener, open }, count)
    }
}

impl Stream for Connections {
    type Item = io::Result<Connection>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.listener.poll_accept(context).map(|accepted| {
            Some(accepted.map(|(stream, _)| {
                self.open.send_modify(|count| *count += 1);
                Connection {
                    stream,
                    open: self.open.clone(),
                }
            }))
        })
    }
}

/// One connection.
pub struct Connection {
    stream: UnixStream,
    open: watch::Sender<usize>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.open.send_modify(|count| *count -= 1);
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
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
    use futures::StreamExt as _;

    #[tokio::test]
    async fn a_connection_counts_until_it_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (mut connections, mut count) = Connections::of(UnixListener::bind(&path).unwrap());
        let _clients = [
            UnixStream::connect(&path).await.unwrap(),
            UnixStream::connect(&path).await.unwrap(),
        ];
        let first = connections.next().await.unwrap().unwrap();
        let second = connections.next().await.unwrap().unwrap();
        assert_eq!(*count.borrow(), 2);
        drop((first, second));
        count.wait_for(|count| *count == 0).await.unwrap();
    }
}
