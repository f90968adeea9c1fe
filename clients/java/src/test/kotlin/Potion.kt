import io.github.safelight.Event
import io.github.safelight.SafelightClient
import java.io.File

fun main(args: Array<String>) {
    SafelightClient.create(args.firstOrNull() ?: "127.0.0.1:8421").use { client ->
        client.generate("a red potion").use { development ->
            for (event in development) when (event) {
                is Event.Preview -> println("step ${event.step}: ${event.data.size()} bytes of ${event.mediaType}")
                is Event.Picture -> File("potion.png").writeBytes(event.data.toByteArray())
                is Event.Accepted, is Event.Progress, is Event.Finished -> {}
            }
        }
    }
}
