use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prost::bytes::Bytes;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
#[cfg(feature = "tls")]
use tonic::transport::ClientTlsConfig;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};

use crate::connect::{CONNECT_TIMEOUT, Connector};
use crate::develop::GenerationStream;
use crate::received::Received;
use crate::upload::Pieces;
use crate::v1::generation_service_client::GenerationServiceClient;
use crate::v1::image_service_client::ImageServiceClient;
use crate::v1::model_service_client::ModelServiceClient;
use crate::{Error, v1};

const WINDOW_BYTES: u32 = 64 << 10; // previews wait at the server, where newer ones replace older ones
const CONNECTION_WINDOW_BYTES: u32 = 1 << 30; // so large that streams that nobody reads never block the others
const MAX_MESSAGE_BYTES: usize = 4 << 20; // larger than every message of a server; the default of gRPC

/// A connection to a server, or to several replicas of one. Clones share it. Its connections live in the Tokio runtime of
/// the first call.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    replicas: Vec<Replica>,
    key: Authorization,
    patience: Duration,
    retries: u32,
    max_message_bytes: usize,
    /// Index of the server that new calls use.
    at: AtomicUsize,
}

struct Replica {
    endpoint: Endpoint,
    connection: Mutex<Connection>,
}

#[derive(Default)]
struct Connection {
    /// How often the connection was replaced.
    number: usize,
    /// `None` before the first call.
    channel: Option<Channel>,
}

impl Replica {
    fn connection(&self) -> MutexGuard<'_, Connection> {
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The connection for stubs of [`v1`]: `CacheServiceClient::new(client.server())`.
pub type Server = InterceptedService<Channel, Authorization>;

/// Adds the API key to calls.
#[derive(Clone, Debug, Default)]
pub struct Authorization(Option<MetadataValue<Ascii>>);

impl Interceptor for Authorization {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(key) = &self.0 {
            request.metadata_mut().insert("authorization", key.clone());
        }
        Ok(request)
    }
}

/// Arguments of a [`Client`].
#[derive(Clone, Debug)]
#[must_use]
pub struct Builder {
    target: String,
    api_key: String,
    patience: Duration,
    retries: u32,
    max_message_bytes: usize,
    #[cfg(feature = "tls")]
    tls: Option<ClientTlsConfig>,
}

impl Builder {
    /// Sends a key as a bearer token.
    pub fn api_key(mut self, key: impl AsRef<str>) -> Self {
        self.api_key = key.as_ref().trim().to_owned();
        self
    }

    /// Uses TLS; without it the connection is plain text. The configuration decides which authorities are trusted:
    /// `ClientTlsConfig::new().with_enabled_roots()` trusts those of this machine.
    #[cfg(feature = "tls")]
    pub fn tls(mut self, tls: ClientTlsConfig) -> Self {
        self.tls = Some(tls);
        self
    }

    /// How long the client tries to resume a generation after a lost connection, counted from its last event; 60 seconds
    /// by default. Before the first event it is at most 5 seconds.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// How often a refused request is sent again if the refusal says after which time; 3 times by default. The client
    /// waits for that time, within its patience and the deadline.
    pub fn retries(mut self, retries: u32) -> Self {
        self.retries = retries;
        self
    }

    /// The largest message that is received, 4 MiB by default; a larger one is `ResourceExhausted`.
    pub fn max_message_bytes(mut self, bytes: usize) -> Self {
        self.max_message_bytes = bytes;
        self
    }

    /// Makes the client. Nothing is connected before the first call.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` if the target names no server, or if the key or the TLS configuration cannot be used.
    pub fn build(self) -> Result<Client, Error> {
        let key = match self.api_key.as_str() {
            "" => None,
            key if key.bytes().all(|byte| byte.is_ascii_graphic()) => Some(
                format!("Bearer {key}")
                    .parse()
                    .expect("it is visible ASCII"),
            ),
            _ => return Err(invalid("the API key must be visible ASCII characters")),
        };
        let replicas = self.target.split(',').map(|one| self.replica(one.trim()));
        Ok(Client(Arc::new(Inner {
            replicas: replicas.collect::<Result<_, _>>()?,
            key: Authorization(key),
            patience: self.patience,
            retries: self.retries,
            max_message_bytes: self.max_message_bytes,
            at: AtomicUsize::new(0),
        })))
    }

    fn replica(&self, target: &str) -> Result<Replica, Error> {
        let endpoint = Endpoint::from_shared(format!("{}://{target}", self.scheme()))
            .ok()
            .filter(|endpoint| {
                let uri = endpoint.uri();
                let named = uri.host().is_some_and(|host| !host.is_empty());
                named && uri.port_u16().is_some() && uri.path() == "/" && !target.contains('@')
            })
            .ok_or_else(|| invalid(format!("target \"{target}\" is not HOST:PORT")))?
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .connect_timeout(2 * CONNECT_TIMEOUT) // never reached: the connector's own limit is shorter
            // While a stream is open, a server that is frozen is noticed within 15 seconds.
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(5));
        #[cfg(feature = "tls")]
        let endpoint = match &self.tls {
            None => endpoint,
            Some(tls) => endpoint
                .tls_config(tls.clone())
                .map_err(|error| invalid(format!("TLS configuration: {error:?}")))?,
        };
        Ok(Replica {
            endpoint,
            connection: Mutex::default(),
        })
    }

    fn scheme(&self) -> &'static str {
        #[cfg(feature = "tls")]
        if self.tls.is_some() {
            return "https";
        }
        "http"
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(Code::InvalidArgument, message)
}

impl Client {
    /// Makes a client of "host:port", in plain text and without an API key. See [`Client::builder`].
    ///
    /// # Errors
    ///
    /// `InvalidArgument` if the target names no server.
    pub fn new(target: impl Into<String>) -> Result<Self, Error> {
        Self::builder(target).build()
    }

    /// Builds a client of "host:port" with further arguments. Several replicas are separated by commas: if one fails, the
    /// client calls the next one, which continues each generation that was accepted as replicated. No proxy is used.
    pub fn builder(target: impl Into<String>) -> Builder {
        Builder {
            target: target.into(),
            api_key: String::new(),
            patience: Duration::from_secs(60),
            retries: 3,
            max_message_bytes: MAX_MESSAGE_BYTES,
            #[cfg(feature = "tls")]
            tls: None,
        }
    }

    /// Starts a generation and returns the stream of its events. Nothing is sent before the stream is polled.
    ///
    /// A request without a `request_id` gets one, so that it can be sent again without running twice.
    pub fn generate(&self, request: impl Into<v1::GenerateRequest>) -> GenerationStream {
        let mut request = request.into();
        if request.request_id.is_empty() {
            request.request_id = uuid::Uuid::new_v4().to_string();
        }
        let received = Received::new(self.at(), String::new(), request.preview.clone());
        GenerationStream::new(self.clone(), Some(request), received)
    }

    /// Watches an existing generation, "generations/ID", from its first event on.
    pub fn watch(
        &self,
        generation: impl Into<String>,
        preview: Option<v1::PreviewPolicy>,
    ) -> GenerationStream {
        let received = Received::new(self.at(), generation.into(), preview);
        GenerationStream::new(self.clone(), None, received)
    }

    /// Returns the present state of a generation.
    ///
    /// # Errors
    ///
    /// If the server refuses the call, or no server can be reached.
    pub async fn get(&self, generation: impl Into<String>) -> Result<v1::Generation, Error> {
        let name = generation.into();
        let call = async |server| {
            let request = v1::GetGenerationRequest { name: name.clone() };
            GenerationServiceClient::new(server)
                .get_generation(request)
                .await
        };
        Ok(self.ask(call).await?.generation.unwrap_or_default())
    }

    /// Stops a generation and returns its final state, with the step that each output had reached.
    ///
    /// # Errors
    ///
    /// If the server refuses the call, or no server can be reached.
    pub async fn cancel(&self, generation: impl Into<String>) -> Result<v1::Generation, Error> {
        let name = generation.into();
        let call = async |server| {
            let request = v1::CancelGenerationRequest { name: name.clone() };
            GenerationServiceClient::new(server)
                .cancel_generation(request)
                .await
        };
        Ok(self.ask(call).await?.generation.unwrap_or_default())
    }

    /// Uploads a picture: PNG, JPEG or WebP. Its name can then be the `init_image` or the `mask` of a spec, for as long as
    /// the server keeps it.
    ///
    /// # Errors
    ///
    /// If the server refuses the picture, or no server can be reached.
    pub async fn upload_image(&self, data: impl Into<Bytes>) -> Result<v1::Image, Error> {
        let data = data.into();
        let call = async |server| {
            let pieces = Pieces::new(data.clone());
            ImageServiceClient::new(server).upload_image(pieces).await
        };
        Ok(self.ask(call).await?.image.unwrap_or_default())
    }

    /// Returns all models of the server.
    ///
    /// # Errors
    ///
    /// If the server refuses the call, or no server can be reached.
    pub async fn models(&self) -> Result<Vec<v1::Model>, Error> {
        let mut models = Vec::new();
        let mut page_token = String::new();
        loop {
            let call = async |server| {
                let page_token = page_token.clone();
                let request = v1::ListModelsRequest {
                    page_size: 0,
                    page_token,
                };
                ModelServiceClient::new(server).list_models(request).await
            };
            let page = self.ask(call).await?;
            models.extend(page.models);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return Ok(models);
            }
        }
    }

    /// The connection to the current server, for stubs of other services. It is replaced after the server has drained.
    pub fn server(&self) -> Server {
        self.server_at(self.at()).0
    }

    /// The connection to a server, and how often it was replaced.
    pub(crate) fn server_at(&self, at: usize) -> (Server, usize) {
        let replica = &self.0.replicas[at];
        let mut connection = replica.connection();
        let connect = || {
            replica
                .endpoint
                .connect_with_connector_lazy(Connector::default())
        };
        let channel = connection.channel.get_or_insert_with(connect).clone();
        let server = InterceptedService::new(channel, self.0.key.clone());
        (server, connection.number)
    }

    /// Makes new calls use a new connection, which a load balancer may lead to another server. Open calls stay on the old
    /// connection, which ends with the last of them. Generations that are refused at the same time replace it only once.
    pub(crate) fn give_up(&self, at: usize, number: usize) {
        let mut connection = self.0.replicas[at].connection();
        if connection.number == number {
            connection.number += 1;
            connection.channel = None;
        }
    }

    pub(crate) fn at(&self) -> usize {
        self.0.at.load(Ordering::Relaxed)
    }

    /// The server to use after one that failed. Generations that lose a server at the same time move to the same next
    /// one, and only the first of them changes the server of new calls.
    pub(crate) fn next(&self, failed: usize) -> usize {
        let after = (failed + 1) % self.num_servers();
        let swap = |from, to| {
            self.0
                .at
                .compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed)
        };
        let _ = swap(failed, after);
        after
    }

    pub(crate) fn num_servers(&self) -> usize {
        self.0.replicas.len()
    }

    pub(crate) fn patience(&self) -> Duration {
        self.0.patience
    }

    pub(crate) fn max_message_bytes(&self) -> usize {
        self.0.max_message_bytes
    }

    pub(crate) fn retries(&self) -> u32 {
        self.0.retries
    }

    /// Makes a call at the current server; if that cannot be reached, at the next ones in turn.
    async fn ask<T, F>(&self, call: impl Fn(Server) -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut left = self.num_servers() - 1;
        loop {
            let at = self.at();
            let failure = match call(self.server_at(at).0).await {
                Ok(response) => return Ok(response.into_inner()),
                Err(status) => Error::from(status),
            };
            if failure.code() != Code::Unavailable || left == 0 {
                return Err(failure);
            }
            left -= 1;
            self.next(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_that_cannot_be_used() {
        for target in ["", " ", "a:1,", "a", ":1", "a:1/b", "http://a:1", "a@b:1"] {
            let error = Client::new(target).err().expect(target);
            assert_eq!(error.code(), Code::InvalidArgument, "{target}");
        }
        for key in ["a b", "a\u{e9}", "a\n"] {
            let made = Client::builder("a:1").api_key(key).build();
            assert_eq!(
                made.is_err(),
                key != "a\n",
                "blanks around a key are none of it"
            );
        }
        for target in ["localhost:8421", "[::1]:8421", "one:8421, other:8421"] {
            assert!(Client::new(target).is_ok(), "{target}");
        }
    }

    #[test]
    fn generations_that_lose_a_server_together_ask_the_next_one() {
        let client = Client::new("a:1,b:1,c:1").unwrap();
        for _ in 0..24 {
            assert_eq!(client.next(0), 1);
        }
        assert_eq!(client.at(), 1, "new calls ask it too");
    }

    #[test]
    fn generations_that_are_refused_together_replace_their_connection_once() {
        let client = Client::new("a:1,b:1").unwrap();
        for _ in 0..24 {
            client.give_up(0, 0);
        }
        assert_eq!(client.0.replicas[0].connection().number, 1);
        assert_eq!(client.0.replicas[1].connection().number, 0);
    }
}
