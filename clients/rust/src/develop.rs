use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_core::Stream;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Code, Request, Streaming};

use crate::received::Received;
use crate::v1::generation_service_client::GenerationServiceClient;
use crate::{Client, Error, Event, Picture, v1};

/// Patience while no event was received, so that a wrong address fails soon.
const FIRST_PATIENCE: Duration = Duration::from_secs(5);
const FIRST_WAIT: Duration = Duration::from_millis(100);
const MAX_WAIT: Duration = Duration::from_secs(2);
/// After these reasons the same generation can be resumed; a lost connection has none.
const RESUMABLE: [Option<&str>; 4] = [
    None,
    Some("WATCHER_STALLED"),
    Some("MOVED"),
    Some("OTHER_MODEL"),
];
/// After these reasons the same call can succeed at another replica.
const ELSEWHERE: [Option<&str>; 2] = [Some("DRAINING"), Some("UNAVAILABLE")];
/// The reason of a server that accepts no new requests.
const DRAINING: Option<&str> = Some("DRAINING");

type Item = Result<Event, Error>;
type Step = dyn Future<Output = (Box<Follower>, Option<Item>)> + Send;

/// The events of one generation: `Accepted`, `Progress`, `Preview` and `Picture` as they come, then `Finished`.
///
/// If the generation does not finish, the last element is an error. Dropping the stream notifies the server, which
/// suspends a generation that nobody watches, and cancels it after its grace period.
#[must_use = "nothing is sent before the stream is polled"]
pub struct GenerationStream {
    /// `None` while `step` runs, which owns it meanwhile.
    follower: Option<Box<Follower>>,
    step: Option<Pin<Box<Step>>>,
}

impl GenerationStream {
    pub(crate) fn new(
        client: Client,
        request: Option<v1::GenerateRequest>,
        received: Received,
    ) -> Self {
        let follower = Follower {
            give_up_at: Instant::now() + FIRST_PATIENCE.min(client.patience()),
            client,
            request,
            received,
            deadline: None,
            connection: None,
            connection_number: 0,
            tries: 0,
            refusals: 0,
            drains: 0,
            num_events: 0,
            ended: false,
        };
        Self {
            follower: Some(Box::new(follower)),
            step: None,
        }
    }

    /// Ends the generation with `DeadlineExceeded` after this time from now, over all connections. Call it before
    /// the stream is polled.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        if let Some(follower) = &mut self.follower {
            follower.deadline = Instant::now().checked_add(timeout);
        }
        self
    }

    /// The next event, as from `StreamExt::next`. Dropping the future loses no event.
    pub async fn next(&mut self) -> Option<Item> {
        poll_fn(|context| Pin::new(&mut *self).poll_next(context)).await
    }

    /// Waits for all pictures, in the order of the outputs.
    ///
    /// # Errors
    ///
    /// If the request was refused, the generation failed, or it could not be resumed.
    pub async fn pictures(mut self) -> Result<Vec<Picture>, Error> {
        let mut pictures = Vec::new();
        while let Some(event) = self.next().await {
            if let Event::Picture(picture) = event? {
                pictures.push(picture);
            }
        }
        pictures.sort_by_key(|picture| picture.output_index);
        Ok(pictures)
    }

    /// Waits for all pictures and returns the first.
    ///
    /// # Errors
    ///
    /// If the request was refused, the generation failed, or it could not be resumed.
    pub async fn picture(self) -> Result<Picture, Error> {
        let pictures = self.pictures().await?;
        let none = || Error::new(Code::DataLoss, "the generation finished without a picture");
        pictures.into_iter().next().ok_or_else(none)
    }
}

impl Stream for GenerationStream {
    type Item = Item;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Item>> {
        let this = self.get_mut();
        let step = this.step.get_or_insert_with(|| {
            let mut follower = this.follower.take().expect("it is there between steps");
            Box::pin(async move {
                let item = follower.next().await;
                (follower, item)
            })
        });
        let (follower, item) = ready!(step.as_mut().poll(context));
        this.step = None;
        this.follower = Some(follower);
        Poll::Ready(item)
    }
}

impl fmt::Debug for GenerationStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GenerationStream").finish_non_exhaustive()
    }
}

/// Follows a generation over as many connections as necessary.
struct Follower {
    client: Client,
    /// `None`: watches a generation that exists.
    request: Option<v1::GenerateRequest>,
    received: Received,
    deadline: Option<Instant>,
    connection: Option<Connection>,
    /// How often the connection to the server had been replaced when the last call was made.
    connection_number: usize,
    give_up_at: Instant,
    tries: u32,
    refusals: u32,
    drains: u32,
    /// Number of events that had been received when the last connection was lost.
    num_events: u64,
    ended: bool,
}

enum Connection {
    Generate(Streaming<v1::GenerateResponse>),
    Watch(Streaming<v1::WatchGenerationResponse>),
}

impl Follower {
    async fn next(&mut self) -> Option<Item> {
        while !self.ended {
            let failure = match self.receive().await {
                Ok(Some(message)) => match self.received.take(message) {
                    Ok(None) => continue,
                    Ok(Some(event)) => return Some(Ok(event)),
                    Err(damage) => return self.end(Some(damage)),
                },
                Ok(None) if self.received.finished => return self.end(None),
                Ok(None) => self.unfinished(),
                Err(failure) => failure,
            };
            self.connection = None;
            if let Err(failure) = self.wait(failure).await {
                return self.end(Some(failure));
            }
        }
        None
    }

    fn end(&mut self, failure: Option<Error>) -> Option<Item> {
        self.ended = true;
        self.connection = None;
        failure.map(Err)
    }

    /// The next message; `None` at the end of the call.
    async fn receive(&mut self) -> Result<Option<v1::GenerationEvent>, Error> {
        let Some(deadline) = self.deadline else {
            return self.receive_at_leisure().await;
        };
        match timeout_at(deadline, self.receive_at_leisure()).await {
            // tonic enforces the deadline too, but reports it as a lost connection.
            Ok(Err(failure)) if failure.reason().is_none() && Instant::now() >= deadline => {
                Err(late())
            }
            Ok(received) => received,
            Err(_) => Err(late()),
        }
    }

    async fn receive_at_leisure(&mut self) -> Result<Option<v1::GenerationEvent>, Error> {
        if self.connection.is_none() {
            self.connection = Some(self.open().await?);
        }
        match self.connection.as_mut().expect("it was opened") {
            Connection::Generate(stream) => {
                let response = stream.message().await?;
                Ok(response.map(|response| response.event.unwrap_or_default()))
            }
            Connection::Watch(stream) => {
                let response = stream.message().await?;
                Ok(response.map(|response| response.event.unwrap_or_default()))
            }
        }
    }

    /// Starts the generation, or watches it if it has a name already.
    async fn open(&mut self) -> Result<Connection, Error> {
        let (server, number) = self.client.server_at(self.received.at);
        self.connection_number = number;
        let mut service = GenerationServiceClient::new(server)
            .max_decoding_message_size(self.client.max_message_bytes());
        Ok(match &self.request {
            Some(request) if self.received.name.is_empty() => {
                let call = service.generate(self.timed(request.clone()));
                Connection::Generate(call.await?.into_inner())
            }
            _ => {
                let call = service.watch_generation(self.timed(self.received.watch()));
                Connection::Watch(call.await?.into_inner())
            }
        })
    }

    fn timed<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(deadline) = self.deadline {
            request.set_timeout(deadline.saturating_duration_since(Instant::now()));
        }
        request
    }

    /// Waits until the next attempt to resume the generation; returns the failure if there is none.
    async fn wait(&mut self, failure: Error) -> Result<(), Error> {
        if self.received.num_events > self.num_events {
            self.num_events = self.received.num_events;
            (self.tries, self.refusals, self.drains) = (0, 0, 0);
            self.give_up_at = Instant::now() + self.client.patience();
        }
        let goes_on_elsewhere = self.received.durable || self.received.name.is_empty();
        let movable = self.client.num_servers() > 1 && goes_on_elsewhere;
        let draining = failure.reason() == DRAINING;
        if draining {
            self.client
                .give_up(self.received.at, self.connection_number);
            if self.drains == 0 {
                self.give_up_at = Instant::now() + self.client.patience();
            }
            self.drains += 1;
        }
        let pause = if is_resumable(&failure, movable) {
            let doubled = FIRST_WAIT * 2_u32.pow(self.tries.min(10));
            self.tries += 1;
            scaled(doubled.min(MAX_WAIT), 0.5, 1.0)
        } else if draining && goes_on_elsewhere {
            scaled(failure.retry_after().unwrap_or(FIRST_WAIT), 1.0, 1.2)
        } else if let Some(after) = self.refused_for_now(&failure)
            && self.refusals < self.client.retries()
        {
            if self.refusals == 0 {
                self.give_up_at = Instant::now() + self.client.patience();
            }
            self.refusals += 1;
            scaled(after, 1.0, 1.2) // clients must not all retry at the same moment
        } else {
            return Err(failure);
        };
        let again = Instant::now() + pause;
        let too_late = self.deadline.is_some_and(|deadline| again > deadline);
        if again > self.give_up_at || too_late && failure.retry_after().is_some() {
            return Err(failure);
        }
        if movable && failure.reason() != Some("WATCHER_STALLED") {
            self.received.at = self.client.next(self.received.at);
        }
        let sleeping = sleep(pause);
        match self.deadline {
            None => sleeping.await,
            Some(deadline) => timeout_at(deadline, sleeping).await.map_err(|_| late())?,
        }
        Ok(())
    }

    /// The time after which the server asks to retry, if nothing has started.
    fn refused_for_now(&self, failure: &Error) -> Option<Duration> {
        let asked_for_more = failure.code() == Code::ResourceExhausted;
        failure
            .retry_after()
            .filter(|_| asked_for_more || self.received.name.is_empty())
    }

    fn unfinished(&self) -> Error {
        let name = match self.received.name.as_str() {
            "" => "the generation",
            name => name,
        };
        let message = format!("the stream of {name} ended before the generation had finished");
        Error::new(Code::Unavailable, message)
    }
}

fn late() -> Error {
    Error::new(Code::DeadlineExceeded, "the deadline has passed")
}

/// Whether the same generation can be resumed. `movable`: another server can continue it.
fn is_resumable(failure: &Error, movable: bool) -> bool {
    let reason = failure.reason();
    failure.code() == Code::Unavailable
        && (RESUMABLE.contains(&reason) || movable && ELSEWHERE.contains(&reason))
}

fn scaled(wait: Duration, least: f64, most: f64) -> Duration {
    wait.mul_f64(least + (most - least) * fastrand::f64())
}
