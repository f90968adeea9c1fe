// Tests that need no server: targets on this machine, arguments, the next replica, errors, damaged pictures.
#include <cstdlib>
#include <iostream>

#include "../src/channels.h"
#include "../src/received.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace v1 = safelight::v1;

#define CHECK(condition)                                                                \
  do {                                                                                  \
    if (!(condition)) {                                                                 \
      std::cerr << __FILE__ << ":" << __LINE__ << ": not so: " << #condition << "\n";   \
      std::exit(1);                                                                     \
    }                                                                                   \
  } while (false)

template <typename Expected, typename Work>
Expected thrown(Work work) {
  try {
    work();
  } catch (const Expected& error) {
    return error;
  }
  std::cerr << "nothing was thrown\n";
  std::exit(1);
}

void test_targets_of_this_machine() {
  for (const char* target : {"127.0.0.1:8421", "localhost:8421", "[::1]:8421", "dns:///localhost:8421", "ipv4:127.0.0.2:1",
                             "unix:/run/safelight.sock", "a.localhost:1", "127.0.0.2", "::1"}) {
    CHECK(safelight::is_local(target));
  }
  for (const char* target : {"safelight.example:8421", "10.0.0.1:8421", "[2001:db8::1]:8421", "localhost.example:1", ""}) {
    CHECK(!safelight::is_local(target));
  }
}

void test_arguments_that_cannot_be_used() {
  for (const char* target : {"", " ", "a:1,", ",", "a:1,,b:1"}) {
    thrown<std::invalid_argument>([&] { safelight::Client client(target); });
  }
  safelight::ClientOptions options;
  options.api_key = "a b";
  thrown<std::invalid_argument>([&] { safelight::Client client("a:1", options); });
  options.api_key = " key\n";  // as it is read from a file
  safelight::Client client(" a:1 , b:1 ", options);
}

void test_generations_that_lose_a_server_together_ask_the_next_one() {
  safelight::Client::Impl client("a:1,b:1,c:1", {});
  for (int i = 0; i < 24; ++i) CHECK(client.next(0) == 1);
  CHECK(client.at() == 1);
  CHECK(client.next(2) == 0 && client.at() == 1);
}

void test_generations_that_are_refused_together_replace_their_connection_once() {
  safelight::Client::Impl client("a:1", {});
  const auto draining = client.channel(0);
  client.give_up(0, draining);
  const auto fresh = client.channel(0);
  CHECK(fresh != draining);
  client.give_up(0, draining);
  CHECK(client.channel(0) == fresh);
}

void test_errors_are_readable() {
  google::rpc::Status whole;
  google::rpc::ErrorInfo info;
  google::rpc::RetryInfo retry;
  google::rpc::BadRequest bad;
  info.set_reason("QUEUE_FULL");
  retry.mutable_retry_delay()->set_seconds(3);
  retry.mutable_retry_delay()->set_nanos(500);
  bad.add_field_violations()->set_field("spec.model");
  bad.mutable_field_violations(0)->set_description("x");
  whole.add_details()->PackFrom(info);
  whole.add_details()->PackFrom(retry);
  whole.add_details()->PackFrom(bad);
  const safelight::Error error({grpc::RESOURCE_EXHAUSTED, "the queue is full", whole.SerializeAsString()});
  CHECK(error.code() == grpc::RESOURCE_EXHAUSTED && error.reason() == "QUEUE_FULL");
  CHECK(error.retry_after() == std::chrono::nanoseconds(3'000'000'500));
  CHECK(error.violations().at("spec.model") == "x");
  CHECK(std::string(error.what()) == "RESOURCE_EXHAUSTED: the queue is full");
  const safelight::Error bare({grpc::UNAVAILABLE, "gone", "no status"});
  CHECK(bare.reason().empty() && !bare.retry_after() && bare.violations().empty());
}

v1::GenerationEvent chunk(std::int64_t offset, const std::string& data, std::int64_t total, const std::string& sha256 = "") {
  v1::GenerationEvent event;
  event.set_generation("generations/1");
  auto& given = *event.mutable_artifact_chunk();
  given.set_offset(offset);
  given.set_data(data);
  given.set_total_bytes(total);
  given.set_sha256(sha256);
  return event;
}

void test_pieces_of_a_picture() {
  using namespace std::string_literals;
  // SHA-256 of "abc", FIPS 180-4.
  const std::string digest =
      "\xba\x78\x16\xbf\x8f\x01\xcf\xea\x41\x41\x40\xde\x5d\xae\x22\x23\xb0\x03\x61\xa3\x96\x17\x7a\x9c\xb4\x10\xff\x61"
      "\xf2\x00\x15\xad"s;
  safelight::Received received(0, {}, "");
  auto first = chunk(0, "a", 3), twice = chunk(0, "a", 3), last = chunk(1, "bc", 3, digest), late = chunk(1, "bc", 3, digest);
  CHECK(!received.take(first) && !received.take(twice));
  CHECK(received.watch().name() == "generations/1" && received.watch().artifact_offsets(0).offset() == 1);
  const auto event = received.take(last);
  CHECK(event && std::get<safelight::Picture>(*event).data == "abc");
  CHECK(!received.take(late) && received.watch().artifact_offsets(0).offset() == 3);

  safelight::Received other(0, {}, "");
  auto damaged = chunk(0, "abd", 3, digest);
  CHECK(thrown<safelight::Error>([&] { other.take(damaged); }).code() == grpc::DATA_LOSS);
}

int main() {
  test_targets_of_this_machine();
  test_arguments_that_cannot_be_used();
  test_generations_that_lose_a_server_together_ask_the_next_one();
  test_generations_that_are_refused_together_replace_their_connection_once();
  test_errors_are_readable();
  test_pieces_of_a_picture();
  std::cout << "ok\n";
}
