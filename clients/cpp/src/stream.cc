#include "stream.h"

#include <algorithm>
#include <array>
#include <random>
#include <string_view>

#include "safelight/v1/generation.grpc.pb.h"

namespace safelight {
namespace {

using namespace std::chrono_literals;
using std::chrono::nanoseconds;

constexpr nanoseconds kFirstPatience = 5s;  // while no event was received, so that a wrong address fails soon
constexpr nanoseconds kFirstWait = 100ms;
constexpr nanoseconds kMaxWait = 2s;

// After these reasons the same generation can be resumed; "" is a lost connection.
constexpr std::array<std::string_view, 4> kResumable = {"", "WATCHER_STALLED", "MOVED", "OTHER_MODEL"};
// After these reasons the same call can succeed at another replica.
constexpr std::array<std::string_view, 2> kElsewhere = {"DRAINING", "UNAVAILABLE"};
// Reason of a server that accepts no new requests.
constexpr std::string_view kDraining = "DRAINING";

template <typename Names>
bool contains(const Names& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

nanoseconds scaled(nanoseconds wait, double least, double most) {
  thread_local std::minstd_rand random{std::random_device{}()};
  return nanoseconds(static_cast<std::int64_t>(wait.count() * std::uniform_real_distribution(least, most)(random)));
}

/// Whether the generation can be resumed. `movable`: another server can continue it.
bool is_resumable(const Error& failure, bool movable) {
  return failure.code() == grpc::UNAVAILABLE &&
         (contains(kResumable, failure.reason()) || (movable && contains(kElsewhere, failure.reason())));
}

/// Whether the server has said when to retry, and nothing has started.
bool is_refused_for_now(const Error& failure, const Received& received) {
  return failure.retry_after() && (failure.code() == grpc::RESOURCE_EXHAUSTED || received.name.empty());
}

Error unfinished(const std::string& generation) {
  const std::string which = generation.empty() ? "the generation" : generation;
  return Error({grpc::UNAVAILABLE, "the stream of " + which + " ended before the generation had finished"});
}

}  // namespace

Stream::Impl::Impl(std::shared_ptr<Client::Impl> client, std::optional<v1::GenerateRequest> request, Received received,
                   std::optional<nanoseconds> timeout)
    : client_(std::move(client)),
      request_(std::move(request)),
      received_(std::move(received)),
      deadline_(timeout ? std::optional(Clock::now() + *timeout) : std::nullopt),
      give_up_at_(Clock::now() + std::min(kFirstPatience, client_->patience())) {}

Stream::Impl::~Impl() {
  close();
  finish();
}

std::optional<Event> Stream::Impl::next() {
  while (!ended_) {
    if (!call_) open();
    v1::GenerationEvent message;
    if (call_->read(message)) {
      try {
        if (auto event = received_.take(message)) return event;
      } catch (...) {
        ended_ = true;
        close();
        throw;
      }
      continue;
    }
    const grpc::Status status = finish();
    if (std::lock_guard lock(mutex_); closed_ || (status.ok() && received_.finished)) {
      ended_ = true;
      break;
    }
    wait_to_retry(status.ok() ? unfinished(received_.name) : Error(status));
  }
  return {};
}

void Stream::Impl::close() {
  std::lock_guard lock(mutex_);
  closed_ = true;
  if (call_) call_->context.TryCancel();  // tells the server that nobody watches
  closing_.notify_all();
}

namespace {

/// Reads the events of either call's responses.
template <typename Call, typename Response>
void read_with(Call& call, std::unique_ptr<grpc::ClientReader<Response>> unique) {
  std::shared_ptr<grpc::ClientReader<Response>> reader = std::move(unique);
  call.read = [reader](v1::GenerationEvent& event) {
    Response response;
    if (!reader->Read(&response)) return false;
    event = std::move(*response.mutable_event());
    return true;
  };
  call.finish = [reader] { return reader->Finish(); };
}

}  // namespace

/// Starts the generation, or watches it if it has a name already.
void Stream::Impl::open() {
  auto fresh = std::make_unique<Call>();
  Call& call = *fresh;
  client_->authorize(call.context);
  if (deadline_) {
    const auto left = std::chrono::duration_cast<std::chrono::system_clock::duration>(*deadline_ - Clock::now());
    call.context.set_deadline(std::chrono::system_clock::now() + left);
  }
  {
    std::lock_guard lock(mutex_);
    call_ = std::move(fresh);  // set before the call begins, so that close() can end its wait for a connection
    if (closed_) call.context.TryCancel();
  }
  channel_ = client_->channel(received_.at);
  const auto stub = v1::GenerationService::NewStub(channel_);
  if (received_.name.empty()) {
    read_with(call, stub->Generate(&call.context, *request_));
  } else {
    read_with(call, stub->WatchGeneration(&call.context, received_.watch()));
  }
}

/// Ends the present connection, if there is one.
grpc::Status Stream::Impl::finish() {
  if (!call_) return grpc::Status::OK;
  const grpc::Status status = call_->finish();
  std::lock_guard lock(mutex_);
  call_.reset();
  return status;
}

/// Waits until the next attempt to resume. Throws `failure` if there is none, or none in time.
void Stream::Impl::wait_to_retry(const Error& failure) {
  if (received_.num_events > num_events_) {
    tries_ = refusals_ = drains_ = 0;
    num_events_ = received_.num_events;
    give_up_at_ = Clock::now() + client_->patience();
  }
  const bool goes_on_elsewhere = received_.durable || received_.name.empty();
  const bool movable = client_->size() > 1 && goes_on_elsewhere;
  const bool draining = failure.reason() == kDraining;
  if (draining) {
    client_->give_up(received_.at, channel_);
    if (drains_++ == 0) give_up_at_ = Clock::now() + client_->patience();
  }
  nanoseconds wait{0};
  if (is_resumable(failure, movable)) {
    wait = scaled(std::min(kMaxWait, kFirstWait * (1 << std::min(tries_, 10))), 0.5, 1);
    ++tries_;
  } else if (draining && goes_on_elsewhere) {
    wait = scaled(failure.retry_after().value_or(kFirstWait), 1, 1.2);
  } else if (is_refused_for_now(failure, received_) && refusals_ < client_->retries()) {
    if (refusals_ == 0) give_up_at_ = Clock::now() + client_->patience();
    wait = scaled(*failure.retry_after(), 1, 1.2);  // clients must not all retry at the same moment
    ++refusals_;
  } else {
    ended_ = true;
    throw failure;
  }
  const Clock::time_point again = Clock::now() + wait;
  if (again > give_up_at_ || (failure.retry_after() && deadline_ && again > *deadline_)) {
    ended_ = true;
    throw failure;
  }
  if (movable && failure.reason() != "WATCHER_STALLED") received_.at = client_->next(received_.at);
  // If the deadline passes meanwhile, the next call fails with it at once.
  std::unique_lock lock(mutex_);
  closing_.wait_until(lock, deadline_ ? std::min(again, *deadline_) : again, [this] { return closed_; });
}

}  // namespace safelight
