//! Makes connections to one server, with a time limit. All calls that wait for a connection share its failure.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep, timeout};
use tower_service::Service;

/// Time limit of a TCP connection, and then of the server's first byte (of its TLS handshake or HTTP/2 settings).
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// tonic makes a new connection for each waiting call. For this long after a failure, they all fail with that failure.
const SAME_FAILURE: Duration = Duration::from_millis(50);

#[derive(Clone, Default)]
pub(crate) struct Connector {
    failed: Arc<Mutex<Option<(Instant, String)>>>,
}

impl Connector {
    fn fail(&self, error: io::Error) -> io::Error {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        *failed = Some((Instant::now(), error.to_string()));
        error
    }

    fn just_failed(&self) -> Option<io::Error> {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        let (when, said) = failed.as_ref()?;
        (when.elapsed() < SAME_FAILURE).then(|| io::Error::other(said.clone()))
    }
}

impl Service<Uri> for Connector {
    type Response = Connection;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Connection>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move {
            if let Some(failure) = connector.just_failed() {
                return Err(failure);
            }
            let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
            let connected = timeout(
                CONNECT_TIMEOUT,
                TcpStream::connect((host, uri.port_u16().unwrap_or_default())),
            );
            let stream = match connected.await {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => return Err(connector.fail(error)),
                Err(_) => return Err(connector.fail(late("it did not take the connection"))),
            };
            stream.set_nodelay(true)?;
            Ok(Connection {
                stream: TokioIo::new(stream),
                silence: Some(Box::pin(sleep(CONNECT_TIMEOUT))),
                connector,
            })
        })
    }
}

fn late(what: &str) -> io::Error {
    let seconds = CONNECT_TIMEOUT.as_secs();
    io::Error::new(
        io::ErrorKind::TimedOut,
        format!("the server is silent: {what} within {seconds} s"),
    )
}

/// A connection that fails if the server sends nothing at first. hyper's keepalive takes three times as long to notice,
/// and it does not cover a TLS handshake.
pub(crate) struct Connection {
    stream: TokioIo<TcpStream>,
    /// Elapses if the server sends nothing in time; `None` once it has sent something.
    silence: Option<Pin<Box<Sleep>>>,
    connector: Connector,
}

impl Read for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let read = Pin::new(&mut this.stream).poll_read(context, buffer);
        if read.is_ready() {
            this.silence = None;
        } else if let Some(silence) = &mut this.silence
            && silence.as_mut().poll(context).is_ready()
        {
            this.silence = None;
            return Poll::Ready(Err(this.connector.fail(late("it did not answer"))));
        }
        read
    }
}

impl Write for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;
    use crate::{Client, Code};

    /// Time is virtual: it advances when all tasks wait.
    #[tokio::test(start_paused = true)]
    async fn a_server_that_never_answers_is_an_error() {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = server.local_addr().unwrap().to_string();
        let client = Client::builder(address)
            .patience(Duration::from_secs(1))
            .build()
            .unwrap();
        let began = Instant::now();
        let error = client.generate("a red potion").picture().await.unwrap_err();
        assert_eq!(error.code(), Code::Unavailable);
        assert!(error.message().contains("the server is silent"), "{error}");
        assert!(began.elapsed() < 2 * CONNECT_TIMEOUT);
    }

    #[cfg(feature = "tls")]
    #[tokio::test(start_paused = true)]
    async fn all_calls_that_wait_for_a_connection_fail_with_it() {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = server.local_addr().unwrap().to_string();
        let builder = Client::builder(address).patience(Duration::from_secs(1));
        let tls = crate::ClientTlsConfig::new().domain_name("safelight.example");
        let client = builder.tls(tls).build().unwrap();
        let began = Instant::now();
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..24 {
            let stream = client.generate("a red potion");
            calls.spawn(stream.picture());
        }
        while let Some(call) = calls.join_next().await {
            assert_eq!(call.unwrap().unwrap_err().code(), Code::Unavailable);
        }
        assert!(
            began.elapsed() < 2 * CONNECT_TIMEOUT,
            "not one after the other"
        );
    }
}
